"""2D images: reading, masks, layouts of folders, data sets, and writing predictions."""
