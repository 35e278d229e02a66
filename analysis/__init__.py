"""What people look at: evaluation reports, pictures, curves, and what messengers do."""
