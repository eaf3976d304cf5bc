// Writes and reads a request with what protoc-gen-es generates.

import { create, fromBinary, toBinary } from '@bufbuild/protobuf';

import { StreamChatCompletionRequestSchema } from './gen/es/deltawire/v1/chat_completion_pb';
import { ModelRegistry } from './gen/es/deltawire/v1/model_registry_pb';

const sent = create(StreamChatCompletionRequestSchema, {
  start: {
    case: 'chat',
    value: { messages: [{ role: { case: 'user', value: { text: 'How warm is it in Oslo?' } } }] },
  },
});
const received = fromBinary(StreamChatCompletionRequestSchema, toBinary(StreamChatCompletionRequestSchema, sent));
const role = received.start.case === 'chat' ? received.start.value.messages[0]?.role : undefined;
console.log(role?.case === 'user' ? role.value.text : 'lost', ModelRegistry.typeName);
