"""What saving costs a training on a GPU; needs no Keras."""
