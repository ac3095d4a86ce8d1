"""Where models come from and go to: runs, open_clip's models and weights, repositories on the Hub."""
