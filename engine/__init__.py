"""The loops. The only place where models, data, optimizer and learning rate meet."""
