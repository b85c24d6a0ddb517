"""What a trained model is worth: predictions, their page, a judge."""
