"""Teaching a trained model how to answer."""
