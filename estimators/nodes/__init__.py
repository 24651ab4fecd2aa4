"""Estimators of the gradient of an expectation over one stochastic node."""
