"""Kernels small enough to read in one sitting, for the notebooks about the simulator. The model does not use them."""
