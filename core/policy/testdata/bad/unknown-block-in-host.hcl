host "*" {
  confrim {
    ask = "always"
  }
  acl {
  }
}
