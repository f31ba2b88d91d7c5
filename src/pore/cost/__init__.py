"""Cost: shapes of models, and the FLOPs that follow from them."""
