host "*" {
  forward {
    local "127.0.0.1:5432" {}
    local {
      to = "x:1"
    }
    local "127.0.0.1:5433" "more" {
      to = "x:1"
    }
    dynamic "127.0.0.1:1080" {
      to = "x:1"
    }
    dynamic "127.0.0.1:1080" {
      users = "everybody"
    }
    lokal "127.0.0.1:1" {}
  }
}
