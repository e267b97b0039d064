"""The loops. The only place where models, data, optimizer and learning rate meet."""

import utils.surroundings  # noqa: F401  (before torchvision, which may ask for the name of the user)
