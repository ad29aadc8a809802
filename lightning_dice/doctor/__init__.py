"""A doctor for data: what a source holds, and what is wrong with it."""
