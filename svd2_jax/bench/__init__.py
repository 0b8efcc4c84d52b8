"""How long each part of a stream takes, and how near that is to what the device can do."""
