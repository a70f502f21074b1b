"""Runs the trainer on a CUDA device that does not exist: shapes, dtypes and devices, but no values.

Tensors on the host are real, those on the device are fake tensors. An operator that mixes both raises MixedDevices, as
it would on a GPU. What the host reads from the device is recorded; it reads zeros. See device.py.
"""
