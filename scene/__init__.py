"""The scene: frames, cameras, Gaussians and their files."""
