# frozen_string_literal: true

# The README's command generates the stubs before `gem build`.
Gem::Specification.new do |gem|
  gem.name = 'deltawire'
  gem.version = '0.1.0'
  gem.summary = 'A client of the deltawire gateway: chat completions as streams of typed events'
  gem.authors = ['deltawire']
  gem.license = 'Apache-2.0'
  gem.files = Dir['lib/**/*.rb', 'README.md', 'LICENSE', base: __dir__]
  gem.required_ruby_version = '>= 3.1'
  # gRPC brings google-protobuf, and googleapis-common-protos-types with the messages of google.rpc.
  gem.add_runtime_dependency 'grpc', '~> 1.51'
  # Stubs of protoc 3.21 do not load with google-protobuf 4.
  gem.add_runtime_dependency 'google-protobuf', '~> 3.21'
end
