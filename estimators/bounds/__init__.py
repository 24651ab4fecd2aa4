"""Estimators of the gradients of multi-sample bounds."""
