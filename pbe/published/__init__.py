"""Code that `pbe export` copies into a published folder, so that diffusers opens it without pbe. It imports no pbe."""
