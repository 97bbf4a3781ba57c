"""From base weights, LoRAs and text to the checkpoint that cnq converts."""
