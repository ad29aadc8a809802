"""The checks of a data set behind `lightning_dice.inspect`."""
