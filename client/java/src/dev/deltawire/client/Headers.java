package dev.deltawire.client;

import io.grpc.Metadata;
import java.security.SecureRandom;
import java.util.HexFormat;

/** The names of headers, and ids to send in them. */
final class Headers {
  static final Metadata.Key<String> REQUEST_ID = key("x-request-id");
  /** Calls with the same route go to the same gateway. */
  static final Metadata.Key<String> ROUTE = key("x-deltawire-route");
  /** A proxy sends it to name the gateway that has the completion, and gets it back. */
  static final Metadata.Key<String> GATEWAY = key("x-deltawire-gateway");

  private static final SecureRandom RANDOM = new SecureRandom();

  private Headers() {}

  static Metadata.Key<String> key(String name) {
    return Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER);
  }

  /** Whether a value can be sent in a header. */
  static boolean isSendable(String value) {
    return value.chars().allMatch(character -> '!' <= character && character <= '~');
  }

  /** An id that cannot be guessed. */
  static String id() {
    byte[] bytes = new byte[16];
    RANDOM.nextBytes(bytes);
    return HexFormat.of().formatHex(bytes);
  }
}
