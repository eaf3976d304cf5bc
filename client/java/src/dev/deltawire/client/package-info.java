/**
 * A client for deltawire gateways: {@link dev.deltawire.client.Client} connects, {@link dev.deltawire.client.ChatStream} reads an
 * answer, {@link dev.deltawire.client.ModelWatch} follows the models. Requests and events are the API's own messages,
 * {@code dev.deltawire.v1}.
 */
package dev.deltawire.client;
