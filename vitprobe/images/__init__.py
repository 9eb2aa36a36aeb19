"""From a folder, tar, array or dataset to the same images in the same order; labels; decoding."""
