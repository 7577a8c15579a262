"""The scene: frames, cameras, Gaussians, their files and their growth."""
