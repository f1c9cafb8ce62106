"""What saving costs a whole `fit`, ours and others."""
