"""What is measured on estimators and models: statistics of vectorised gradients."""
