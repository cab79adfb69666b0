host "*" {
  confirm {}
  persist {
    until = "24:00"
  }
}
