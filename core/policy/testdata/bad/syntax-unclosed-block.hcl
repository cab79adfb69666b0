host "*" {
  share = true
