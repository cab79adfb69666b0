hots "*" {
}
mastr {
}
share = true
