"""Whole fits of a Keras model: with stepsave, with other systems, and without saving."""
