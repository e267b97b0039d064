"""What is told of runs afterwards: from their results folders to tables, curves and a page."""
