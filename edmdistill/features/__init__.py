"""Networks that look at images: feature spaces, classifiers, perceptual distances."""
