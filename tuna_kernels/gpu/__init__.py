"""What GPU kernels share: whether they can run here, how they are launched, what there is to compile."""
