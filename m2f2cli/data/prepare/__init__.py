"""From videos and annotations to the files that training and evaluation read."""
