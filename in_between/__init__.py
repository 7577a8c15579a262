"""In-between frames without a trained model: classical interpolation, and a prediction along the motion."""
