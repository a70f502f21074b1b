"""Runs the trainer on a CUDA device that does not exist.

Tensors on the device compute on the CPU, and say that they are on `cuda:0`. An operator that mixes devices raises
MixedDevices, and what the host reads from the device is recorded. See device.py.
"""
