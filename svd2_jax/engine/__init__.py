"""The shell around the pure core: restores parameters, compiles, donates and runs sessions."""
