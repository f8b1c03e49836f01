"""Products in 8-bit floating point: formats and scales, the layer's functions, and quantised weights."""
