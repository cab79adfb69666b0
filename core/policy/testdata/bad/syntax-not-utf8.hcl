host "*" {
  deny { reason = "ÿþ" }
}
