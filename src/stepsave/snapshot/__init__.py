"""Device → arena: the only code that knows the array types of the backends."""
