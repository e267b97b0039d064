"""Many runs of one command with other settings: which there are, one after another, and a table of them."""
