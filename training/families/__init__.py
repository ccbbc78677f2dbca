"""Model families, by the name used in configurations and manifests. To add one: write its file and list it here."""

from training.families.atlas_vae import AtlasVAE
from training.families.autoencoder import Autoencoder
from training.families.cite_autoencoder import CiteAutoencoder
from training.families.family import Family
from training.families.gmvae import GMVAE
from training.families.vae import VAE

FAMILIES: dict[str, type[Family]] = {
    family.name: family for family in (AtlasVAE, Autoencoder, CiteAutoencoder, GMVAE, VAE)
}
