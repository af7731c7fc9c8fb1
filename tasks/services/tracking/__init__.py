"""Experiment tracking: MLflow, TensorBoard, Weights & Biases."""
