"""Loggers: TensorBoard, SwanLab, several at once, none."""
