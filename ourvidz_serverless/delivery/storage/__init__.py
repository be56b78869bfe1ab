"""Where assets go: a directory, an S3-compatible bucket, or Supabase Storage by REST."""
