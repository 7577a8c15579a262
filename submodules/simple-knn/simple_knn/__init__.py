"""Exact nearest-neighbour distances of a point cloud: see `simple_knn._C.distCUDA2`."""
