"""Changes to the layers of a pretrained network. All but those of `adapt` keep its function."""
