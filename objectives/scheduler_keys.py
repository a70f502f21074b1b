"""Keys of a scheduler config that several modules set."""

V_PREDICTION = {"prediction_type": "v_prediction"}


# then sampling must begin with the last timestep (Lin et al. 2024, section 3.3)
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
