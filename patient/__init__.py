"""The patient: volumes and labels in files, where frames lie, and meshes."""
