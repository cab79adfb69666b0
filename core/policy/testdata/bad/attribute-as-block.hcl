host "*" {
  via {
  }
  confirm = "always"
}
