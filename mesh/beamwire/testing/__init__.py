"""The test kit: throwaway authorities and synthetic data. Never imported at run time."""
