"""Changes to a network that keep its function, or say by how much they change it."""
