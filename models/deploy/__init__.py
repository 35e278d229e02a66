"""Files for other programs, and runtimes that compute in place of PyTorch."""
